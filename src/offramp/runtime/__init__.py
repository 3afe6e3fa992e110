"""What happens when a network runs: sessions, batches, engines, recording, measuring."""
