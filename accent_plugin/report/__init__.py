"""Figures and text as Markdown, HTML, PNG and CSV."""
