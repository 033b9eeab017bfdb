"""One view seen twice under augmentation: SimCLR and MoCo."""
