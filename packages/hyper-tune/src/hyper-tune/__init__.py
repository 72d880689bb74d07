"""Entry points that `tune run hyper-tune/<recipe>` finds by their path."""
