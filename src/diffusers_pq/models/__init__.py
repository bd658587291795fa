"""Models: the product quantiser, the autoencoder around it and its discriminator."""
