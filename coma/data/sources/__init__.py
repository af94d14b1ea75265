"""Sources of images: folders, tar shards, `.npz` files, and parts of them."""
