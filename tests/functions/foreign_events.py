"""What other services send to a Lambda function: written by us after the shapes that AWS documents, not recorded.

Source: the AWS Lambda developer guide ("Using other services", a page for each service) and the guides of the services
themselves. Only what tells an event's kind is kept, and some of what surrounds it. ``EVENTS`` maps a name to the event,
and to what the refusal has to call it.
"""

from __future__ import annotations

import copy
from typing import Any

Event = dict[str, Any]

REGION, ACCOUNT = "eu-west-1", "123456789012"
AUTHORIZER = "the question of an authorizer"
QUERY = "a request of a load balancer or of a REST API"


def arn(service: str, what: str) -> str:
    return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{what}"


def records(source: str, *kept: Event) -> tuple[Event, str]:
    """The services that call with a list of records, each of which says where it comes from."""
    common = {"eventSource": source, "awsRegion": REGION, "eventVersion": "1.0"}
    return {"Records": [{**common, **one} for one in kept or ({},)]}, f"records of {source}"


def rule(source: str, kind: str, **detail: Any) -> tuple[Event, str]:
    """EventBridge: its own rules, schedules, and the services that speak through it."""
    event = {"version": "0", "id": "1", "detail-type": kind, "source": source, "account": ACCOUNT,
             "time": "2026-11-22T10:00:00Z", "region": REGION, "resources": [], "detail": detail}  # fmt: skip
    return event, f"the event {kind!r} of {source}"


def cognito(trigger: str, **request: Any) -> tuple[Event, str]:
    event = {"version": "1", "triggerSource": trigger, "region": REGION, "userPoolId": "pool", "userName": "ada",
             "callerContext": {"clientId": "1"}, "request": request, "response": {}}  # fmt: skip
    return event, f"the trigger {trigger!r} of Cognito"


def rest(method: str, path: str, body: str | None = None, **more: Any) -> tuple[Event, str]:
    event = {"resource": "/{proxy+}", "path": path, "httpMethod": method, "headers": {"Accept": "*/*"},
             "multiValueHeaders": {"Accept": ["*/*"]}, "queryStringParameters": None, "pathParameters": {"proxy": "x"},
             "stageVariables": None, "requestContext": {"stage": "prod", "httpMethod": method, "requestId": "1"},
             "body": body, "isBase64Encoded": False}  # fmt: skip
    return {**event, **more}, QUERY


def balancer(method: str, path: str, **more: Any) -> tuple[Event, str]:
    event = {"requestContext": {"elb": {"targetGroupArn": arn("elasticloadbalancing", "targetgroup/a/b")}},
             "httpMethod": method, "path": path, "queryStringParameters": {}, "headers": {"host": "example.com"},
             "body": "", "isBase64Encoded": False}  # fmt: skip
    return {**event, **more}, QUERY


def websocket(kind: str, route: str, body: str | None = None) -> tuple[Event, str]:
    context = {"routeKey": route, "eventType": kind, "connectionId": "abc=", "stage": "prod", "apiId": "1",
               "domainName": "1.execute-api.eu-west-1.amazonaws.com", "messageDirection": "IN"}  # fmt: skip
    event: Event = {"requestContext": context, "isBase64Encoded": False}
    return ({**event, "body": body} if body is not None else event), "this event"


def other(**event: Any) -> tuple[Event, str]:
    """Services whose events say nothing of where they come from."""
    return event, "this event"


CHAT = '{"model": "demo", "messages": [{"role": "user", "content": "hi"}]}'

EVENTS: dict[str, tuple[Event, str]] = {
    # HTTP of other kinds
    "rest api get": rest("GET", "/v1/models"),
    "rest api post": rest("POST", "/v1/chat/completions", CHAT),
    "rest api base64": rest("POST", "/v1/chat/completions", "e30=", isBase64Encoded=True),
    "rest api without headers": rest("GET", "/", headers=None, multiValueHeaders=None),
    "rest api version 1.0": rest("GET", "/", version="1.0"),
    "http api version 1.0": rest("POST", "/v1/completions", CHAT, version="1.0", resource="$default"),
    "rest api options": rest("OPTIONS", "/"),
    "rest api authorizer context": rest("GET", "/", requestContext={"authorizer": {"claims": {"sub": "1"}}}),
    "balancer get": balancer("GET", "/"),
    "balancer health check": balancer("GET", "/livez", headers={"user-agent": "ELB-HealthChecker/2.0"}),
    "balancer post": balancer("POST", "/v1/chat/completions", body=CHAT),
    "balancer with multi-value headers": balancer("GET", "/", headers=None, multiValueHeaders={"host": ["a", "b"]}),
    "balancer base64": balancer("POST", "/", body="e30=", isBase64Encoded=True),
    "websocket connect": websocket("CONNECT", "$connect"),
    "websocket message": websocket("MESSAGE", "$default", CHAT),
    "websocket disconnect": websocket("DISCONNECT", "$disconnect"),
    "lattice 1": other(
        raw_path="/", method="GET", headers={"a": "b"}, query_string_parameters={}, body=None, is_base64_encoded=False
    ),
    "lattice 2": other(
        version="2.0",
        path="/",
        method="GET",
        headers={"a": ["b"]},
        requestContext={"serviceNetworkArn": arn("vpc-lattice", "servicenetwork/1")},
    ),
    "token authorizer": (
        {"type": "TOKEN", "authorizationToken": "abc", "methodArn": arn("execute-api", "1/prod/GET/")},
        AUTHORIZER,
    ),
    "request authorizer": (
        {
            "type": "REQUEST",
            "methodArn": arn("execute-api", "1/prod/GET/"),
            "httpMethod": "GET",
            "path": "/",
            "requestContext": {"stage": "prod"},
        },
        AUTHORIZER,
    ),
    "http authorizer": (
        {
            "version": "2.0",
            "type": "REQUEST",
            "routeArn": arn("execute-api", "1"),
            "identitySource": ["a"],
            "rawPath": "/v1/chat/completions",
            "requestContext": {"http": {"method": "POST", "path": "/"}},
        },
        AUTHORIZER,
    ),
    # queues, topics, streams
    "sqs": records("aws:sqs", {"messageId": "1", "receiptHandle": "x", "body": "text", "attributes": {}}),
    "sqs with a chat as its body": records("aws:sqs", {"messageId": "1", "body": CHAT}),
    "sqs batch": records("aws:sqs", *({"messageId": str(n), "body": "x"} for n in range(10))),
    "sqs fifo": records("aws:sqs", {"body": "x", "attributes": {"MessageGroupId": "1", "SequenceNumber": "2"}}),
    "sns": (
        {
            "Records": [
                {
                    "EventVersion": "1.0",
                    "EventSource": "aws:sns",
                    "EventSubscriptionArn": arn("sns", "t:1"),
                    "Sns": {"Type": "Notification", "Message": CHAT, "Subject": None},
                }
            ]
        },
        "records of aws:sns",
    ),
    "kinesis": records("aws:kinesis", {"kinesis": {"partitionKey": "1", "data": "SGVsbG8="}, "eventID": "shard:1"}),
    "kinesis tumbling window": (
        {**records("aws:kinesis")[0], "window": {"start": "a", "end": "b"}, "state": {}, "shardId": "shard"},
        "records of aws:kinesis",
    ),
    "firehose": other(
        invocationId="1",
        deliveryStreamArn=arn("firehose", "deliverystream/d"),
        region=REGION,
        records=[{"recordId": "1", "data": "SGVsbG8=", "approximateArrivalTimestamp": 1}],
    ),
    "dynamodb insert": records("aws:dynamodb", {"eventName": "INSERT", "dynamodb": {"Keys": {"id": {"S": "1"}}}}),
    "dynamodb modify": records("aws:dynamodb", {"eventName": "MODIFY", "dynamodb": {"NewImage": {}, "OldImage": {}}}),
    "dynamodb remove": records("aws:dynamodb", {"eventName": "REMOVE", "dynamodb": {}}),
    "msk": (
        {
            "eventSource": "aws:kafka",
            "eventSourceArn": arn("kafka", "cluster/c"),
            "bootstrapServers": "b:9092",
            "records": {"topic-0": [{"topic": "topic", "partition": 0, "offset": 1, "value": "SGVsbG8="}]},
        },
        "records of aws:kafka",
    ),
    "self-managed kafka": (
        {"eventSource": "SelfManagedKafka", "bootstrapServers": "b:9092", "records": {}},
        "records of SelfManagedKafka",
    ),
    "activemq": (
        {
            "eventSource": "aws:mq",
            "eventSourceArn": arn("mq", "broker:b"),
            "messages": [{"messageID": "1", "messageType": "jms/text-message", "data": "SGVsbG8="}],
        },
        "records of aws:mq",
    ),
    "rabbitmq": (
        {
            "eventSource": "aws:rmq",
            "eventSourceArn": arn("mq", "broker:b"),
            "rmqMessagesByQueue": {"q::/": [{"basicProperties": {}, "redelivered": False, "data": "e30="}]},
        },
        "records of aws:rmq",
    ),
    "documentdb": (
        {
            "eventSource": "aws:docdb",
            "eventSourceArn": arn("rds", "cluster:c"),
            "events": [{"event": {"_id": {}, "operationType": "insert"}}],
        },
        "records of aws:docdb",
    ),
    # storage and databases
    "s3 put": records(
        "aws:s3", {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "k"}}}
    ),
    "s3 delete": records("aws:s3", {"eventName": "ObjectRemoved:Delete", "s3": {}}),
    "s3 restore": records("aws:s3", {"eventName": "ObjectRestore:Completed", "glacierEventData": {}}),
    "s3 test": other(Service="Amazon S3", Event="s3:TestEvent", Bucket="b", RequestId="1", HostId="2"),
    "s3 batch": other(invocationSchemaVersion="2.0", invocationId="1", job={"id": "j"}, tasks=[{"taskId": "t"}]),
    "s3 object lambda": other(
        xAmzRequestId="1",
        getObjectContext={"inputS3Url": "https://x", "outputRoute": "r"},
        userRequest={"url": "https://x", "headers": {}},
        protocolVersion="1.00",
    ),
    "rds notification": records("aws:rds"),
    "secrets manager rotation": other(
        Step="createSecret", SecretId=arn("secretsmanager", "secret:s"), ClientRequestToken="1"
    ),
    # EventBridge and what speaks through it
    "schedule": rule("aws.events", "Scheduled Event"),
    "ec2 state": rule("aws.ec2", "EC2 Instance State-change Notification", state="running"),
    "spot interruption": rule("aws.ec2", "EC2 Spot Instance Interruption Warning"),
    "s3 through eventbridge": rule("aws.s3", "Object Created", bucket={"name": "b"}),
    "codepipeline state": rule("aws.codepipeline", "CodePipeline Pipeline Execution State Change"),
    "codebuild state": rule("aws.codebuild", "CodeBuild Build State Change"),
    "guardduty": rule("aws.guardduty", "GuardDuty Finding"),
    "security hub": rule("aws.securityhub", "Security Hub Findings - Imported", findings=[]),
    "health": rule("aws.health", "AWS Health Event"),
    "ecs task": rule("aws.ecs", "ECS Task State Change"),
    "glue job": rule("aws.glue", "Glue Job State Change"),
    "step functions state": rule("aws.states", "Step Functions Execution Status Change"),
    "cloudtrail call": rule("aws.iam", "AWS API Call via CloudTrail", eventName="CreateUser"),
    "own bus": rule("com.example.orders", "OrderPlaced", messages=["hi"], prompt="x"),
    "cloudwatch alarm through eventbridge": rule("aws.cloudwatch", "CloudWatch Alarm State Change"),
    "macie": rule("aws.macie", "Macie Finding"),
    "scheduler with a text": other(input="text"),
    # operations
    "cloudwatch alarm": other(
        source="aws.cloudwatch",
        alarmArn=arn("cloudwatch", "alarm:a"),
        accountId=ACCOUNT,
        alarmData={"alarmName": "a", "state": {"value": "ALARM"}},
    ),
    "cloudwatch logs": other(awslogs={"data": "H4sIAAAAAAAA"}),
    "config change": other(
        invokingEvent="{}",
        ruleParameters="{}",
        resultToken="t",
        eventLeftScope=False,
        configRuleName="r",
        accountId=ACCOUNT,
        version="1.0",
    ),
    "config schedule": other(
        invokingEvent='{"messageType": "ScheduledNotification"}', configRuleArn=arn("config", "r")
    ),
    "cloudformation create": other(
        RequestType="Create",
        ResponseURL="https://x",
        StackId=arn("cloudformation", "s"),
        RequestId="1",
        ResourceType="Custom::X",
        LogicalResourceId="x",
    ),
    "cloudformation delete": other(RequestType="Delete", ResponseURL="https://x", PhysicalResourceId="p"),
    "cloudformation macro": other(
        region=REGION,
        accountId=ACCOUNT,
        fragment={},
        transformId="t",
        requestId="1",
        params={},
        templateParameterValues={},
    ),
    "codecommit": records("aws:codecommit", {"codecommit": {"references": []}, "eventTriggerName": "t"}),
    "codepipeline job": ({"CodePipeline.job": {"id": "1", "accountId": ACCOUNT, "data": {}}}, "this event"),
    "codedeploy hook": other(DeploymentId="d-1", LifecycleEventHookExecutionId="e"),
    "autoscaling": other(AutoScalingGroupARN=arn("autoscaling", "g"), InstancesToTerminate=[], Cause="SCALE_IN"),
    "service catalog": other(requestId="1", operation="PROVISION_PRODUCT", inputs={}),
    # people, devices, media
    "ses": records("aws:ses", {"ses": {"mail": {"messageId": "1"}, "receipt": {}}}),
    "cognito pre sign-up": cognito("PreSignUp_SignUp", userAttributes={"email": "a@example.com"}),
    "cognito post confirmation": cognito("PostConfirmation_ConfirmSignUp", userAttributes={}),
    "cognito pre authentication": cognito("PreAuthentication_Authentication"),
    "cognito custom message": cognito("CustomMessage_SignUp", codeParameter="####"),
    "cognito pre token": cognito("TokenGeneration_HostedAuth", groupConfiguration={}),
    "cognito define challenge": cognito("DefineAuthChallenge_Authentication", session=[]),
    "cognito migration": cognito("UserMigration_Authentication", password="x"),
    "cognito sync": other(version=2, eventType="SyncTrigger", region=REGION, identityPoolId="p", datasetName="d"),
    "alexa intent": other(
        version="1.0", session={"new": True}, context={}, request={"type": "IntentRequest", "intent": {"name": "Hi"}}
    ),
    "alexa launch": other(version="1.0", session={}, request={"type": "LaunchRequest"}),
    "alexa smart home": other(
        directive={"header": {"namespace": "Alexa.Discovery", "name": "Discover"}, "payload": {}}
    ),
    "lex 1": other(
        messageVersion="1.0",
        invocationSource="DialogCodeHook",
        userId="u",
        bot={"name": "b"},
        currentIntent={"name": "i", "slots": {}},
        inputTranscript="hi",
    ),
    "lex 2": other(
        messageVersion="1.0",
        invocationSource="FulfillmentCodeHook",
        inputMode="Text",
        sessionId="1",
        bot={"id": "b"},
        sessionState={"intent": {"name": "i"}},
        interpretations=[],
        proposedNextState={"prompt": {"attempt": "Initial"}},
    ),
    "connect": other(Name="ContactFlowEvent", Details={"ContactData": {"ContactId": "1"}, "Parameters": {}}),
    "iot rule": other(temperature=21.5, topic="sensors/1", deviceId="d"),
    "iot button": other(serialNumber="G030", clickType="SINGLE", batteryVoltage="2000 mV"),
    "iot events": other(payload={"actionExecutionId": "1", "detector": {"detectorModelName": "m"}, "state": {}}),
    "greengrass": other(message="hello", topic="t"),
    "bedrock agent": other(
        messageVersion="1.0",
        agent={"name": "a"},
        inputText="hi",
        sessionId="1",
        actionGroup="g",
        apiPath="/x",
        parameters=[],
    ),
    "ground truth": other(version="2018-10-16", labelingJobArn=arn("sagemaker", "labeling-job/l"), dataObject={}),
    "transcribe": rule("aws.transcribe", "Transcribe Job State Change", TranscriptionJobStatus="COMPLETED"),
    "mediaconvert": rule("aws.mediaconvert", "MediaConvert Job State Change"),
    # edges and backends
    "cloudfront viewer request": (
        {
            "Records": [
                {
                    "cf": {
                        "config": {"eventType": "viewer-request"},
                        "request": {"method": "GET", "uri": "/", "headers": {}},
                    }
                }
            ]
        },
        "records of another service",
    ),
    "cloudfront origin response": (
        {
            "Records": [
                {"cf": {"config": {"eventType": "origin-response"}, "response": {"status": "200", "headers": {}}}}
            ]
        },
        "records of another service",
    ),
    "appsync": other(
        arguments={"id": "1"},
        identity=None,
        source=None,
        request={"headers": {}},
        prev=None,
        info={"fieldName": "get", "parentTypeName": "Query"},
        stash={},
    ),
    "appsync events": other(
        info={"channel": {"path": "/default/x"}, "operation": "PUBLISH"}, events=[{"id": "1"}], identity=None
    ),
    "appsync authorizer": other(authorizationToken="t", requestContext={"apiId": "1", "queryString": "query {}"}),
    "amplify resolver": other(typeName="Query", fieldName="f", arguments={}, identity={}, source={}),
    "step functions task": other(TaskToken="t", input={"a": 1}),
    "step functions state input": other(orderId=1, items=[1, 2, 3]),
    "transfer family": other(token="t", fileTransferDetails={"sessionId": "1"}, stepName="s"),
    "transfer identity": other(username="ada", protocol="SFTP", serverId="s", sourceIp="192.0.2.1"),
    "workmail": other(summaryVersion="2018-10-10", envelope={"mailFrom": {"address": "a@example.com"}}, messageId="1"),
    "pinpoint": other(Message={}, ApplicationId="a", CampaignId="c", Endpoints={"1": {}}),
    "quicksight": other(requestType="x"),
    "lambda destination": other(
        version="1.0",
        timestamp="2026-11-22T10:00:00Z",
        requestContext={"condition": "Success", "functionArn": arn("lambda", "function:f")},
        requestPayload={},
        responsePayload={},
    ),
    "warm-up plug-in": other(source="serverless-plugin-warmup"),
    "console test": other(key1="value1", key2="value2", key3="value3"),
    "a health probe": other(ping=True),
}
"""More than a hundred, by a name of our own."""


def mutations(event: Event) -> dict[str, Event]:
    """Return events that are almost that one: pieces gone, of another type, or twice as deep."""
    found: dict[str, Event] = {}
    for key in event:
        found[f"without {key}"] = {name: value for name, value in event.items() if name != key}
        found[f"{key} is null"] = {**event, key: None}
        found[f"{key} is a list"] = {**event, key: [event[key]]}
        found[f"{key} is a number"] = {**event, key: 7}
    context = event.get("requestContext")
    for key in context if isinstance(context, dict) else ():
        changed = copy.deepcopy(event)
        changed["requestContext"][key] = [1]
        found[f"requestContext.{key} is a list"] = changed
    return found
