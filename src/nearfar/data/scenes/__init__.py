"""Pictures of things that stand in relations: readers of annotated pairs, composed and generated scenes."""
