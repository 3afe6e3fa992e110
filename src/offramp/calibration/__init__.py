"""The room of promises: which risk, which bound, which test; arrays in, arrays out, no torch."""
