"""The KV pool: where the slots live, on the device and in host memory."""
