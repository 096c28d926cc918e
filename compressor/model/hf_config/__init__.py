"""Read and write what config.json says of compression: quantization_config in all its layouts, and block configs."""
