"""The offline stages, one command each; they meet through files."""
