"""What a run is trained on: folders, tables, tar files, masks; augmentation; order of samples."""
