"""What is made or mended from rows that were there before, in batches that can be stopped, resumed and repeated."""
