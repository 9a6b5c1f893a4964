"""What this machine is and has: processor, threads, disk, environment."""
