"""Measures of quality and diversity, and what is made of them: tables and figures."""
