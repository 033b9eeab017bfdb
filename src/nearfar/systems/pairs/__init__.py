"""Two or more views of the same items, contrasted: whatever the views are."""
