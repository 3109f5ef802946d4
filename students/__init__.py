"""The students: their template, packs, training, quantised variants and publication."""
