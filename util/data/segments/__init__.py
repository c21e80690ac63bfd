"""Images with segmentation masks: listings, joint transforms and samples."""
