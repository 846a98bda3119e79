"""What a run is told: fields, TOML and `--set`, contradictions, what a resume may change."""
