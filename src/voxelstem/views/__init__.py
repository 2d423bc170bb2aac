"""What the model sees: windowing, resampling, crops, tiles, augmentations and masks."""
