"""Generates text: options, sampler, stop strings, streams, batches and speculative decoding."""
