output "function_url" {
  value = aws_lambda_function_url.this.function_url
}

output "usage_table" {
  value = aws_dynamodb_table.usage.name
}
