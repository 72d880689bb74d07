"""Small attention hypernetworks that generate the parameters of any PyTorch model."""
