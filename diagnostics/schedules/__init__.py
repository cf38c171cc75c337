"""From recorded spectra to Newton–Schulz steps per operator, and the file that holds them."""
