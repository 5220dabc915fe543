"""What operators order over HTTP, with `--enable-admin`."""
