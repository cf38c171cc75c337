"""What is measured on one matrix at one step, one idea per file."""
