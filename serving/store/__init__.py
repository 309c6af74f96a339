"""The registry's database: tables, migrations, connections. Knows neither HTTP nor what an adapter computes."""
