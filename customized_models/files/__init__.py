"""What lies on a disk: strict readers, safetensors checkpoints, digests, manifests."""
