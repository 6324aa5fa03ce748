"""Recall at k, the ranking engine, two-stage retrieval, tables and figures."""
