"""Data sets of images, the order of training, augmentation, and loaders of batches."""
