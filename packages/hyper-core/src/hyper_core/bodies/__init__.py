"""What mixes the tokens of one matrix; one body a file, configuration and network together."""
