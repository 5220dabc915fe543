"""Strategies against the oracle and the ledger against a recount on random traces, KV maps against ledgers, a run's
tokens against transformers' own generation, constraints of structured output against the server's bounds, and how
often the rules of reports err (verdicts, the steady part).
"""
