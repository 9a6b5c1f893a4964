"""Facts about this machine: processor, threads, disk and environment."""
