//! Data: from text files to packed, memory-mapped token sequences.
