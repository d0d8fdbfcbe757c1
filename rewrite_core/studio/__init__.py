"""The studio: draw an edit in a browser, at the speed of the hand."""
