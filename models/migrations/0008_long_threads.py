from tortoise import migrations
from tortoise.indexes import Index
from tortoise.migrations import operations as ops


class Migration(migrations.Migration):
    """An index that has the messages of a thread in their order, in place of one that had them in none.

    PostgreSQL expects few messages of a thread. Where it could have them in no order by one index, it took them all
    and sorted them, for a page of ten out of ten thousand as well.
    """

    dependencies = [("threadgraph", "0007_attempts")]

    initial = False

    operations = [
        ops.AddIndex(model_name="Message", index=Index(fields=["thread_id", "depth"], name="messages_by_depth")),
        ops.RemoveIndex(model_name="Message", name="messages_siblings"),
    ]
