"""The schema: types, inputs, scalars, connections, loaders, context and limits. `graph.schema` puts it together."""
