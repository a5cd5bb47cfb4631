"""What every backend shares and no array library owns: reading a model folder, drawing on the host, host memory."""
