variable "name" {
  type        = string
  description = "What the function and everything that belongs to it is called."
}

variable "image_uri" {
  type        = string
  description = "The image in ECR, as built from the context of `make package TARGET=lambda`."
}

variable "architecture" {
  type        = string
  default     = "x86_64"
  description = "What the image was built for."

  validation {
    condition     = contains(["x86_64", "arm64"], var.architecture)
    error_message = "Lambda runs x86_64 or arm64."
  }
}

variable "memory_mib" {
  type        = number
  default     = 3538
  description = "1,769 MiB are one vCPU."
}

variable "timeout_s" {
  type        = number
  default     = 300
  description = "An answer ends one second before it, with finish_reason \"length\"."
}

variable "auth_type" {
  type        = string
  default     = "AWS_IAM"
  description = "With NONE whoever has an API key may call (`pilotlight keys create --ledger dynamodb://TABLE`)."

  validation {
    condition     = contains(["AWS_IAM", "NONE"], var.auth_type)
    error_message = "A function URL knows AWS_IAM and NONE."
  }
}

variable "allowed_origins" {
  type        = list(string)
  default     = []
  description = "The origins whose pages may call the URL from a browser."
}

variable "reserved_concurrency" {
  type        = number
  default     = 10
  description = "How many sandboxes there may be at most, and so what an hour can cost at most."
}

variable "resume_secret" {
  type        = string
  default     = ""
  sensitive   = true
  description = "16 characters or more; with it, answers that the timeout cuts off can be continued."
}

variable "ephemeral_storage_mib" {
  type        = number
  default     = 512
  description = "Where an artifact from S3 goes; SnapStart allows no more than 512."
}

variable "artifact_uri" {
  type        = string
  default     = ""
  description = "s3://BUCKET/PREFIX of an artifact that is fetched at the start; the image's own without it."
}

variable "artifact_arn" {
  type        = string
  default     = ""
  description = "arn:aws:s3:::BUCKET/PREFIX/*, what the function may read for that."
}

variable "provisioned_concurrency" {
  type        = number
  default     = 0
  description = "How many sandboxes are kept warm, and paid for; 0 for none."
}

variable "snap_start" {
  type        = bool
  default     = false
  description = "Start from a snapshot; not together with provisioned concurrency."
}

variable "log_retention_days" {
  type        = number
  default     = 30
  description = "How long CloudWatch keeps the logs."
}
