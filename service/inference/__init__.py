"""Models on their devices: sessions, engines, batching, upsampling."""
