"""What is deployed, checked without a cluster: schemas, what the operators refuse, security, agreement."""
