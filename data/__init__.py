"""Prompts, verdicts and datasets, and the foundations (settings, errors, tables) that every other room stands on."""
