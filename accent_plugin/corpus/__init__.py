"""From a Common Voice release, folders, a CSV file, the Hub or eSpeak to a DatasetDict."""
