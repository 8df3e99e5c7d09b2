"""A file for each operator of the registry, which the fuzzer needs: `valid_case(rng)`, random valid inputs and attributes."""
