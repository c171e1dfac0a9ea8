"""Reports: what runs measured, as one HTML page, as figures for papers, as JSON and CSV. No model is loaded.

`summary` turns evidence into numbers and sentences, `page` puts them into HTML, `figures` into PNG and SVG.
"""
