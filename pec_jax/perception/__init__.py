"""What an image looks like to an encoder, and how surprising it is within its group."""
