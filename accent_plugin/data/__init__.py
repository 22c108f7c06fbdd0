"""From a DatasetDict to 16 kHz clips and manifests."""
