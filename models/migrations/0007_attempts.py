from tortoise import fields, migrations
from tortoise.migrations import operations as ops


class Migration(migrations.Migration):
    dependencies = [("threadgraph", "0006_providers")]

    initial = False

    operations = [
        ops.AddField(model_name="Message", name="attempt", field=fields.SmallIntField(db_default=1)),
        ops.AddField(model_name="Stream", name="reasoning_effort", field=fields.TextField(null=True, unique=False)),
        ops.AddField(model_name="Stream", name="answer_tokens", field=fields.BigIntField(null=True)),
    ]
