"""The definitions of kernels/reference in torch, for any device: what runs where Triton does not."""
