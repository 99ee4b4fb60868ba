"""What every invocation used and cost: records, prices, and the ledger that keeps them."""
