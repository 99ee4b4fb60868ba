terraform {
  required_version = ">= 1.5"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.28"
    }
  }
}

resource "aws_lambda_function" "this" {
  function_name                  = var.name
  package_type                   = "Image"
  image_uri                      = var.image_uri
  architectures                  = [var.architecture]
  memory_size                    = var.memory_mib
  timeout                        = var.timeout_s
  role                           = aws_iam_role.this.arn
  reserved_concurrent_executions = var.reserved_concurrency
  publish                        = true

  ephemeral_storage {
    size = var.ephemeral_storage_mib
  }

  environment {
    variables = merge(
      {
        PILOTLIGHT_LEDGER_TABLE = aws_dynamodb_table.usage.name
        PILOTLIGHT_REQUIRE_KEYS = var.auth_type == "NONE" ? "true" : "false"
      },
      var.resume_secret == "" ? {} : { PILOTLIGHT_RESUME_SECRET = var.resume_secret },
      var.artifact_uri == "" ? {} : { PILOTLIGHT_ARTIFACT = var.artifact_uri },
    )
  }

  logging_config {
    log_format = "Text"
    log_group  = aws_cloudwatch_log_group.this.name
  }

  dynamic "snap_start" {
    for_each = var.snap_start ? [true] : []
    content {
      apply_on = "PublishedVersions"
    }
  }
}

resource "aws_lambda_alias" "live" {
  name             = "live"
  function_name    = aws_lambda_function.this.function_name
  function_version = aws_lambda_function.this.version
}

resource "aws_lambda_provisioned_concurrency_config" "this" {
  count = var.provisioned_concurrency > 0 ? 1 : 0

  function_name                     = aws_lambda_function.this.function_name
  qualifier                         = aws_lambda_alias.live.name
  provisioned_concurrent_executions = var.provisioned_concurrency
}

resource "aws_lambda_function_url" "this" {
  function_name      = aws_lambda_function.this.function_name
  qualifier          = aws_lambda_alias.live.name
  authorization_type = var.auth_type
  invoke_mode        = "RESPONSE_STREAM"

  dynamic "cors" {
    for_each = length(var.allowed_origins) > 0 ? [true] : []
    content {
      allow_origins  = var.allowed_origins
      allow_methods  = ["GET", "POST"]
      allow_headers  = ["authorization", "content-type", "x-api-key", "x-request-id"]
      expose_headers = ["x-request-id", "retry-after"]
      max_age        = 3600
    }
  }
}

resource "aws_lambda_permission" "url" {
  count = var.auth_type == "NONE" ? 1 : 0

  statement_id           = "public-url"
  action                 = "lambda:InvokeFunctionUrl"
  principal              = "*"
  function_name          = aws_lambda_function.this.function_name
  qualifier              = aws_lambda_alias.live.name
  function_url_auth_type = "NONE"
}

resource "aws_lambda_permission" "invoke" {
  count = var.auth_type == "NONE" ? 1 : 0

  statement_id             = "public-invoke"
  action                   = "lambda:InvokeFunction"
  principal                = "*"
  function_name            = aws_lambda_function.this.function_name
  qualifier                = aws_lambda_alias.live.name
  invoked_via_function_url = true
}

resource "aws_iam_role" "this" {
  name = var.name

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { Service = "lambda.amazonaws.com" }
      Action    = "sts:AssumeRole"
    }]
  })
}

resource "aws_iam_role_policy" "this" {
  name = "logs-and-ledger"
  role = aws_iam_role.this.id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(var.artifact_arn == "" ? [] : [
      {
        Effect   = "Allow"
        Action   = "s3:GetObject"
        Resource = var.artifact_arn
      },
      ], [
      {
        Effect   = "Allow"
        Action   = ["logs:CreateLogStream", "logs:PutLogEvents"]
        Resource = "${aws_cloudwatch_log_group.this.arn}:*"
      },
      {
        Effect   = "Allow"
        Action   = ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:UpdateItem"]
        Resource = aws_dynamodb_table.usage.arn
      },
      {
        Effect   = "Allow"
        Action   = "dynamodb:Query"
        Resource = "${aws_dynamodb_table.usage.arn}/index/open_invocations"
      },
    ])
  })
}

resource "aws_cloudwatch_log_group" "this" {
  name              = "/pilotlight/${var.name}"
  retention_in_days = var.log_retention_days
}

resource "aws_dynamodb_table" "usage" {
  name         = "${var.name}-usage"
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "request_id"

  attribute {
    name = "request_id"
    type = "S"
  }

  attribute {
    name = "open_in"
    type = "S"
  }

  attribute {
    name = "lease_until"
    type = "N"
  }

  global_secondary_index {
    name               = "open_invocations"
    hash_key           = "open_in"
    range_key          = "lease_until"
    projection_type    = "INCLUDE"
    non_key_attributes = ["environment"]
  }

  point_in_time_recovery {
    enabled = true
  }

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_cloudwatch_metric_alarm" "this" {
  for_each = {
    Errors    = "Invocations fail."
    Throttles = "More requests come than the reserved concurrency takes."
  }

  alarm_name          = "${var.name}-${lower(each.key)}"
  alarm_description   = each.value
  namespace           = "AWS/Lambda"
  metric_name         = each.key
  dimensions          = { FunctionName = aws_lambda_function.this.function_name }
  statistic           = "Sum"
  period              = 300
  evaluation_periods  = 1
  threshold           = 0
  comparison_operator = "GreaterThanThreshold"
  treat_missing_data  = "notBreaching"
}
