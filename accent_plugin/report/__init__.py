"""Reports as Markdown, HTML, PNG and CSV."""
