"""What is wrong with a DatasetDict."""
