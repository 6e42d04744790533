"""Small pictures for notebooks, of arrays alone: HTML and SVG in the colours of the page's text."""
