-- KEYS: the value, a hash of v (the version) and d (the data).
-- ARGV: the data, how long it is kept in milliseconds, the version that must
-- be there ('' for none).
local there = redis.pcall('HMGET', KEYS[1], 'v', 'd')
local version, data = there[1], there[2]
local known = version and data and #version <= 16 and string.match(version, '^%d+$')
if not known and redis.call('EXISTS', KEYS[1]) == 1 then
  return redis.error_reply('FOREIGN the key holds no value with a version')
end
if (known and version or '') ~= ARGV[3] then
  return {0, version, data}
end
local time = redis.call('TIME')
local next = tonumber(time[1]) * 1000000 + tonumber(time[2])
if known and tonumber(version) < 9007199254740991 then
  next = math.max(next, tonumber(version) + 1)
end
next = string.format('%.0f', next)
redis.call('HSET', KEYS[1], 'v', next, 'd', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {1, next, false}
